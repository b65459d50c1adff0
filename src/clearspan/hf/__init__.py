"""The only package that imports transformers: loading, configs, taps, attention, running some of the blocks.

`import transformers` takes longer than `import torch`, so it happens inside the functions that need it.
"""
