"""Extension of mkdocstrings: show a docstring below its first paragraph as it is aligned in the source."""

import griffe


class Aligned(griffe.Extension):
    """Turn everything below a docstring's first paragraph into a literal block: its columns are aligned by spaces."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is None:
            return
        first, _, rest = obj.docstring.value.partition("\n\n")
        if rest and "```" not in rest:
            obj.docstring.value = f"{first}\n\n```text\n{rest.rstrip()}\n```"
