"""The only package that imports transformers and installs torch hooks.

`import transformers` takes longer than `import torch`, so it happens inside the functions that need it.
"""
