"""The recipe of `dovetail quickstart`. `examples/quickstart.yaml` has the same text, which a test verifies."""

RECIPE = """\
# The main job: half of the weights pruned, the rest in 4 bits, a LoRA trained inside the mask and on the grid,
# and merged back into the same sparse 4-bit model without losing a bit. `dovetail quickstart` runs this file.
model: playground
chain: wanda(0.5) >> int(bits=4, group=64) >> lora(r=16) >> remask >> regrid
data:
  task: word_problems
train:
  epochs: 5
  lr_scale: 10 # a model this small takes ten times the learning rates that large ones do
  schedule: cosine
  warmup: 0.05
"""
