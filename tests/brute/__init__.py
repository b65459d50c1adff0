"""Brute force: clearspan against plain transformers and torch hooks, on cases drawn at random.

A case is drawn from a seed: a model, rows and their padding, points, places, actions, a metric, a direction, a memory
budget, and the form in which an input is given. The reference computes it in the most direct way, one forward a cell,
and both must agree up to rounding.

    pytest tests/brute -n 2                                    # the draws of continuous integration
    make brute SEED=7                                          # others: any whole number
    SEED=7 pytest "tests/brute/test_sweeps.py::test_cells_are_what_a_forward_of_their_own_gives[12]"

A failure prints what was drawn, and the last line above runs it alone.

Layout
------
The reference knows nothing of clearspan:

- `families.py`: where the parts of each family are, read from its source. `reference.py`: a copy of the model, with
  each point defined once more as a torch hook.
- `rows.py`: ids with a mask; which column a position is. `changes.py`: actions at places. `metrics.py`.
- `cells.py`, `paths.py`, `gradients.py`, `generation.py`: sweeps, paths and circuits, attribution, greedy generation.
- `models.py`: tiny models of `tests/zoo.py`, each built once. `draws.py`: what is drawn, with names.

`ours.py` turns what is drawn into clearspan's objects, and compares. Each `test_*.py` is one kind of experiment.

A new feature
-------------
1. Write what it computes in plain torch, on `Reference.run`: forwards with edits, and nothing clever. A new action is
   one class in `changes.py` with the name and fields of clearspan's, and a line in `Draw._action`. A new point is one
   line in `AXES` and one hook in `reference.py`. A new family is one entry in `FAMILIES`.
2. Draw its arguments with `draw.one("name", options)`, so that a failure prints them: all forms of input, all paddings,
   positions by row and from the end. Let the draw choose what a user could choose, also what makes no sense together
   with the rest; where that must raise, expect the error.
3. Compare with `ours.agree` at real tokens. What padding holds has no meaning, so no action may read it.
4. Break the feature once, and see a draw fail. If none does, draw more often what would have failed.
5. Run ten other seeds. If both sides disagree, find out by the definition in `docs/hook-points.md` which is right.

Keep models at two or three layers and rows at eight tokens: all draws take less than four minutes on two cores.

Kinds of fault, and the draws that find each
--------------------------------------------
Each was put back once, and these failed.

| fault | found by |
|---|---|
| a source run loses its padding mask in patching | `test_patching` |
| inputs of other paddings are mixed by column | `test_patching`, `test_paths`, `test_interventions`, `test_sweeps` |
| `Mean` averages padding; a cache or bare ids lose their mask | `test_interventions`, `test_sweeps`, `test_ablation` |
| a metric's position counts columns | `test_sweeps`, `test_patching`, `test_inputs` (texts) |
| the order of a cell's interventions is the list's, not the model's | `test_sweeps` |
| a norm on attention's output is not computed on what goes into it | `test_paths` (edges, circuits, paths) |
| a direction that does not exist runs as the other one | `test_patching`, `test_paths` |
| odd arguments raise errors of Python or torch | `test_inputs` (odd arguments), `test_caches` (patterns of names) |
| `eigenvalues` has zeros that are not there | `test_inputs` (factored matrices) |
| one scheme of integrated gradients stands for the other | `test_attribution` |
| a generation writes what its source does not have, or no new token without a KV cache | `test_generation` |
| a source's positions are read in the order of the base's | `test_interchange`, `test_interventions` |
| scores next to a sink are written after the subtraction of the maximum | `test_interventions`, `test_sweeps` |
"""
