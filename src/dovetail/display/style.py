"""Colours of the plots, and the style sheet of the pages: light and dark, wide and narrow, on screen and on paper."""

COLOURS = ("#2f6f62", "#b4562f", "#4a61a8", "#86681a", "#8a4a7d", "#3d7fa6", "#6b665f", "#a03c48")
"""Colours of the lines of a plot. The first four are those of an adapter, a pruner, a quantizer and a constraint."""
INK, SOFT, LINE = "#22201d", "#6b665f", "#e4e0d9"

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fbfaf8; --paper: #ffffff; --ink: #22201d; --soft: #6b665f; --line: #e4e0d9; --accent: #2f6f62;
  --pruner: #b4562f; --quantizer: #4a61a8; --adapter: #2f6f62; --constraint: #86681a; --good: #e3f0ea; --warn: #fbeedd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #171614; --paper: #1f1e1b; --ink: #ece8e1; --soft: #a39d93; --line: #38352f; --accent: #7cc4b3;
    --pruner: #e69a76; --quantizer: #9fb1ea; --adapter: #7cc4b3; --constraint: #d9bb6a; --warn: #3a2d1b;
    --good: #1f3029;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue",
  "Liberation Sans", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", Consolas, monospace; }
header { margin-bottom: 2.5rem; }
.kind { margin: 0; color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase; }
h1 { margin: .35rem 0 .25rem; font-size: 1.45rem; line-height: 1.35; font-weight: 600; }
h1 code { overflow-wrap: anywhere; }
.what { margin: 0 0 1.4rem; color: var(--soft); overflow-wrap: anywhere; }
h2 { margin: 0 0 .9rem; font-size: 1.05rem; font-weight: 600; }
section { margin-bottom: 1.5rem; padding: 1.4rem 1.5rem; background: var(--paper); border: 1px solid var(--line);
  border-radius: 10px; break-inside: avoid; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .9rem; }
.card { display: flex; flex-direction: column; padding: .95rem 1.1rem; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px; }
svg { display: block; width: 100%; height: auto; }
.label { color: var(--soft); font-size: .8rem; }
.score { font-size: 1.7rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.before { color: var(--soft); font-size: .85rem; }
.stage-name { display: block; margin-bottom: .4rem; font-weight: 600; }
.groups { display: flex; flex-wrap: wrap; gap: .7rem; }
.links { display: flex; flex-wrap: wrap; align-items: stretch; gap: .5rem; margin-top: .3rem; }
.link { display: flex; flex-direction: column; min-width: 5rem; padding: .5rem .8rem; border: 1px solid var(--line);
  border-left: 4px solid var(--quantizer); border-radius: 6px; }
.link.pruner { border-left-color: var(--pruner); } .link.adapter { border-left-color: var(--adapter); }
.link.constraint { border-left-color: var(--constraint); }
.details { max-width: 13rem; color: var(--soft); font-size: .8rem; }
.arrow { align-self: center; padding-top: 1.2rem; color: var(--soft); }
.down { margin: .6rem 0; color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { color: var(--soft); font-size: .8rem; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
.number { text-align: right; }
td.main { font-weight: 600; color: var(--accent); }
.bar { width: 100%; height: 5px; margin-top: 4px; }
.size { min-width: 6.5rem; }
.track { fill: var(--line); } .fill { fill: var(--accent); }
.note { margin: .9rem 0 0; color: var(--soft); font-size: .87rem; }
.verdict { display: flex; gap: .9rem; align-items: baseline; padding: .9rem 1.1rem; border-radius: 8px;
  background: var(--warn); }
.verdict.exact { background: var(--good); }
header .verdict { margin-bottom: 1.4rem; font-weight: 600; }
.verdict p { margin: 0; }
.mark { font-size: 1.2rem; font-weight: 700; color: var(--accent); }
.lossy .mark, .apart .mark { color: var(--constraint); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem 1.2rem;
  margin: .2rem 0 0; }
.verdict + dl { margin-top: 1.2rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
pre { margin: 0; overflow-x: auto; font-size: .87rem; line-height: 1.5; }
.grid { stroke: var(--line); } .mark { stroke-width: 1; } line.mark { stroke: var(--soft); stroke-dasharray: 3 3; }
.tick { fill: var(--soft); font-size: 12px; }
.raw, .mean, .validation { fill: none; stroke: var(--accent); stroke-linejoin: round; }
.raw { opacity: .3; } .mean { stroke-width: 2.2; } .validation { stroke: var(--pruner); stroke-width: 2.2; }
circle.validation { fill: var(--pruner); }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 0 0 .6rem; color: var(--soft); font-size: .8rem; }
.legend svg { display: inline-block; width: 1.6rem; height: .6rem; margin-right: .4rem; }
.example { padding: .8rem 0; border-top: 1px solid var(--line); }
.example:first-of-type { padding-top: 0; border-top: 0; } .example:last-of-type { padding-bottom: 0; }
.example .text { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .87rem; max-height: 16rem;
  overflow-y: auto; }
.outputs { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .4rem 1rem; margin-top: .5rem; }
mark { background: none; color: var(--accent); font-weight: 600; }
.right { color: var(--accent); font-weight: 600; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .8rem 3rem; } section { padding: 1.1rem 1rem; } .tick { font-size: 22px; }
}
@media print { body { background: none; } section, .card { border-color: #ccc; } }
"""
