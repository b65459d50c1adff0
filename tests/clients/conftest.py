"""Clients: libraries that take the bridge. A folder is collected where its library is installed (`make clients`)."""

from importlib.util import find_spec

LIBRARIES = {"circuitsvis": "circuitsvis", "inseq": "inseq", "nnterp": "nnterp", "saelens": "sae_lens"}

collect_ignore = [folder for folder, library in LIBRARIES.items() if find_spec(library) is None]
