"""Models as Dovetail sees them: where they are, which layers are targets, how layers store weights."""
