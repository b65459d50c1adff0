"""The Jacobian lens: for each depth the mean derivative of the last stream by the stream there, and edits along it.

Depth 0 is the embedding, depth `l + 1` the residual stream that leaves block `l`; the model itself reads the last one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clearspan._forward.readout import added_logits, directions_of
from clearspan.analysis.activations import depths_of, target_ids_of
from clearspan.analysis.steering import SteeringVector
from clearspan.analysis.token_decomposition import TokenDecomposition, pursued
from clearspan.analysis.translators import FittedLens, depth_names, mapped, stream_names
from clearspan.analysis.words import words_of
from clearspan.bridge import TransformerBridge
from clearspan.checks import check_counts, check_fields, number_of, path_of, tensor_of
from clearspan.errors import InvalidArgumentError, NotFiniteError
from clearspan.files import read_published, read_tensors, write_tensors
from clearspan.inputs import Positions
from clearspan.interventions import AddMapped, Intervention
from clearspan.model import check_bridge
from clearspan.modes import no_grad
from clearspan.plots import LineChart
from clearspan.results import Columns

_FORMAT = "clearspan Jacobian lens 1"
_ROWS = 8192
"""Tokens whose directions are formed at a time."""
Tokens = str | int | Sequence[str | int] | Int[Tensor, "token"]
"""One token or several, as text or as ids."""


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens(FittedLens):
    """Mean Jacobians of the last residual stream by that of earlier depths, in float32 on the CPU: `jacobian @ h`.

    A stream read through it says what it leads to at the last depth, to first order and on average over contexts.
    Printed, it is a table of how large each Jacobian is, and how near to the identity, which is the logit lens.

    Attributes:
        jacobians: Of the last stream (first axis) by the stream at each of `depths`.
        depths: Before the last one, rising.
        activation_norms: Mean norm of the streams at `depths` where the derivative was taken; NaN where unknown.
        last_depth: The model's number of layers.
        texts: How many texts the means are over.
        model_name: The model that it was fitted on.

    References:
        Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in Language Models",
        transformer-circuits.pub/2026/workspace.
    """

    jacobians: Float[Tensor, "depth d_model d_model"]
    depths: tuple[int, ...]
    activation_norms: Float[Tensor, "depth"]
    last_depth: int
    texts: int
    model_name: str

    shown: ClassVar[int] = 40
    kind: ClassVar[str] = "Jacobian lens"
    fitted_by: ClassVar[str] = "fit_jacobian_lens(bridge, corpus)"

    @property
    def title(self) -> str:
        """The model, sizes, and what the columns are."""
        return (
            f"Jacobian lens of {self.model_name}, mean over {self.texts} texts: norm of each Jacobian as a multiple of "
            f"the identity's, and cosine with the identity"
        )

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return self.last_depth

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.jacobians.shape[-1]

    def _translated(self, resid: Float[Tensor, "*place d_model"], depth: int) -> Float[Tensor, "*place d_model"]:
        return mapped(resid, self._at(depth)).to(resid.dtype)

    def _at(self, depth: int) -> Float[Tensor, "d_model d_model"]:
        if depth == self.n_layers:
            return torch.eye(self.d_model)
        if depth not in self.depths:
            raise InvalidArgumentError(
                f"the Jacobian lens of {self.model_name} was not fitted at depth {depth}",
                expected=f"depths {', '.join(map(str, self.depths))}, or the last, {self.n_layers}",
                fix=f"depths={[*self.depths, self.n_layers]}",
            )
        return self.jacobians[self.depths.index(depth)]

    # --- directions and edits ----------------------------------------------------------------------------------------

    @no_grad
    def directions(self, bridge: TransformerBridge, tokens: Tokens, depth: int) -> Float[Tensor, "token d_model"]:
        """Returns the direction of the stream at a depth that raises each token's logit most, in float32 on the CPU.

        `jacobian.T @ direction`, for the direction of the last stream that the token's logit reads: the unembedding's
        row through the last norm's weight, and centred where the norm centres.

        Args:
            bridge: The model.
            tokens: One or several, each a text of one token or an id.
            depth: 0 for the embedding, `l + 1` for what leaves block `l`; negative from the end.

        Raises:
            InvalidArgumentError: The lens does not fit the model or was not fitted at that depth; ids outside the
                vocabulary.
            InputError: A text that is not one token.
        """
        self.check_fits(bridge)
        (at,) = depths_of(self.n_layers, [depth])
        read = directions_of(bridge, _ids(bridge, tokens)).cpu()
        return read @ self._at(at).to(read)

    def steering_vector(
        self,
        bridge: TransformerBridge,
        token: str | int,
        *,
        against: str | int | None = None,
        depths: int | Sequence[int] | None = None,
    ) -> SteeringVector:
        """Returns a direction of norm 1 at each depth that leads the model to a token.

        The vector knows the mean norm of the streams, so that `vector.with_norm(vector.activation_norms)` is as long as
        these are, and a strength of 1 is then the stream's own size.

        Args:
            bridge: The model.
            token: What it leads to: a text of one token, or an id.
            against: A token that it leads away from.
            depths: Where; by default all that the lens has.

        Raises:
            InvalidArgumentError: As `directions`; or a direction is zero, as that of a token against itself.
            InputError: A text that is not one token.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import fit_jacobian_lens
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> lens = fit_jacobian_lens(bridge, "def f(self, x): return self.x", depths=[2, 4], skip_first=1)
            >>> vector = lens.steering_vector(bridge, "self", depths=4)
            >>> vector.names
            ('blocks.3.hook_resid_post',)
            >>> vector = vector.with_norm(vector.activation_norms)
            >>> token, text = bridge.to_single_token("self"), "import os"
            >>> steered = bridge(text, interventions=vector.interventions(0.5))
            >>> bool(steered[0, -1].softmax(-1)[token] > 10 * bridge(text)[0, -1].softmax(-1)[token])
            True
        """
        tokens = [token] if against is None else [token, against]
        vectors, norms = {}, {}
        for depth in self._chosen(depths):
            found = self.directions(bridge, tokens, depth)
            name = stream_names(self.n_layers)[depth]
            vectors[name] = found[0] if against is None else found[0] - found[1]
            norms[name] = float(self.activation_norms[self.depths.index(depth)]) if depth in self.depths else torch.nan
        known = {name: norm for name, norm in norms.items() if norm == norm}
        away = "" if against is None else f" against {against!r}"
        return SteeringVector(vectors, known, self.model_name, f"Jacobian lens for {token!r}{away}").with_norm(1.0)

    def ablation(
        self,
        bridge: TransformerBridge,
        tokens: Tokens,
        *,
        depths: int | Sequence[int] | None = None,
        positions: Positions = None,
    ) -> list[Intervention]:
        """Returns the interventions that take away what lies in the span of tokens' directions at each depth.

        Args:
            bridge: The model.
            tokens: One or several.
            depths: Where; by default all that the lens has.
            positions: Where in the text, as in `SteeringVector.interventions`.

        Raises:
            InvalidArgumentError: As `directions`; or directions that are zero, or depend on one another.
            InputError: A text that is not one token.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import fit_jacobian_lens
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> lens = fit_jacobian_lens(bridge, "def f(self, x): return self.x", depths=4, skip_first=1)
            >>> _, cache = bridge.run_with_cache("import os", interventions=lens.ablation(bridge, ["self", "if"]))
            >>> along = cache["resid_post", 3][0] @ lens.directions(bridge, ["self", "if"], 4).T
            >>> bool((along.abs() < 1e-3).all())
            True
        """
        edits = []
        for depth in self._chosen(depths):
            basis = torch.linalg.qr(self._independent(bridge, tokens, depth).T).Q
            edits.append(self._edit(depth, basis, -basis.T, positions))
        return edits

    def swap(
        self,
        bridge: TransformerBridge,
        one: str | int,
        other: str | int,
        *,
        strength: float = 1.0,
        depths: int | Sequence[int] | None = None,
        positions: Positions = None,
    ) -> list[Intervention]:
        """Returns the interventions that exchange how much of two tokens' directions the stream holds.

        `value + strength * V (swapped(c) - c)`, with the two directions as the columns of `V` and `c = pinv(V) @ value`
        the value's coordinates. What is orthogonal to both stays. At several depths the second exchange may undo the
        first.

        Args:
            bridge: The model.
            one: A token.
            other: The other one.
            strength: 1 exchanges; 2 overshoots by as much again.
            depths: Where; by default all that the lens has.
            positions: Where in the text, as in `SteeringVector.interventions`.

        Raises:
            InvalidArgumentError: As `ablation`, or a strength that is no number.
            InputError: A text that is not one token.
        """
        factor, edits = number_of("strength", strength), []
        for depth in self._chosen(depths):
            columns = self._independent(bridge, [one, other], depth).T
            coordinates = torch.linalg.pinv(columns)
            edits.append(self._edit(depth, (coordinates.flip(0) - coordinates).T, factor * columns.T, positions))
        return edits

    @no_grad
    def decompose(
        self, bridge: TransformerBridge, resid: Float[Tensor, "d_model"], depth: int, *, k: int = 10
    ) -> TokenDecomposition:
        """Returns a stream as a sum of few tokens' directions with positive weights, and what is left of it.

        Of all tokens, the one whose direction lies nearest to what is left joins in each step, and the weights of all
        are fitted anew. Tokens with like directions stand for one another, so that the list is one of several that do
        nearly as well.

        Args:
            bridge: The model.
            resid: The stream at one position, such as `cache["resid_post", 3][0, -1]` at depth 4.
            depth: 0 for the embedding, `l + 1` for what leaves block `l`; negative from the end.
            k: How many tokens, at most.

        Raises:
            InvalidArgumentError: As `directions`; a stream that is no vector `[d_model]`, or a `k` of less than one.
            NotFiniteError: The stream is infinite or not a number.

        Example:
            >>> import clearspan
            >>> from clearspan.analysis import fit_jacobian_lens
            >>> bridge = clearspan.boot("tiny-bigcode")
            >>> lens = fit_jacobian_lens(bridge, "def f(self, x): return self.x", depths=4, skip_first=1)
            >>> one = bridge.to_single_token("self")
            >>> lens.decompose(bridge, lens.directions(bridge, one, 4)[0], 4).words[one]
            'self'

        References:
            Gurnee et al. (2026), transformer-circuits.pub/2026/workspace.
        """
        self.check_fits(bridge)
        check_counts(k=k)
        vector = tensor_of("resid", resid)
        if vector.shape != (self.d_model,):
            raise InvalidArgumentError(
                "a decomposition is of the stream at one position",
                expected=f"resid of [{self.d_model}]",
                got=str(list(vector.shape)),
            )
        if not vector.isfinite().all():
            raise NotFiniteError("the stream is not finite", got=str(vector.dtype))
        (at,) = depths_of(self.n_layers, [depth])
        jacobian, target = self._at(at).to(bridge.device), vector.detach().cpu().double()
        ids = torch.arange(bridge.cfg.d_vocab, device=bridge.device)
        lengths = torch.cat([(directions_of(bridge, part) @ jacobian).norm(dim=-1) for part in ids.split(_ROWS)])

        def cosines(vector: Float[Tensor, "d"]) -> Float[Tensor, "atom"]:
            along = added_logits(bridge, jacobian @ vector.to(jacobian))
            return (along / lengths.where(lengths > 0, torch.inf)).cpu()

        def atoms(numbers: list[int]) -> Float[Tensor, "n d"]:
            return torch.nn.functional.normalize(self.directions(bridge, numbers, at), dim=-1)

        found, weights, left = pursued(target, k, cosines, atoms)
        tokens = torch.tensor(found, dtype=torch.long)
        share = 1 - float(left @ left) / max(float(target @ target), torch.finfo(torch.double).tiny)
        return TokenDecomposition(tokens, weights.float(), left.float(), share, words_of(bridge, tokens))

    def _edit(self, depth: int, reads: Tensor, writes: Tensor, positions: Positions) -> Intervention:
        return Intervention(stream_names(self.n_layers)[depth], AddMapped.of(reads, writes), positions=positions)

    def _independent(self, bridge: TransformerBridge, tokens: Tokens, depth: int) -> Float[Tensor, "token d_model"]:
        found = self.directions(bridge, tokens, depth)
        rank = int(torch.linalg.matrix_rank(found))
        if rank < len(found):
            raise InvalidArgumentError(
                f"the directions of {tokens!r} at depth {depth} depend on one another",
                expected=f"{len(found)} directions that span {len(found)} dimensions",
                got=f"{rank}",
            )
        return found

    def _chosen(self, depths: int | Sequence[int] | None) -> list[int]:
        chosen = list(self.depths) if depths is None else depths_of(self.n_layers, depths)
        for depth in chosen:
            self._at(depth)
        return chosen

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def merged(cls, lenses: Sequence["JacobianLens"]) -> Self:
        """Returns the lens of all texts of several lenses of one model, such as were fitted by different processes.

        Raises:
            InvalidArgumentError: There is none, or they are of other models, depths or widths.
        """
        if not isinstance(lenses, Sequence) or not lenses or not all(isinstance(one, JacobianLens) for one in lenses):
            raise InvalidArgumentError("these are no lenses", expected="Jacobian lenses", got=repr(lenses)[:80])
        facts = [(one.model_name, one.depths, one.n_layers, one.d_model) for one in lenses]
        if len(set(facts)) > 1:
            raise InvalidArgumentError(
                "the lenses are not of one model and of the same depths", got="; ".join(map(str, dict.fromkeys(facts)))
            )
        texts = torch.tensor([float(one.texts) for one in lenses])
        share = texts / texts.sum()
        return cls(
            torch.einsum("n,nlij->lij", share, torch.stack([one.jacobians for one in lenses])),
            lenses[0].depths,
            share @ torch.stack([one.activation_norms for one in lenses]),
            lenses[0].last_depth,
            int(texts.sum()),
            lenses[0].model_name,
        )

    def save(self, path: str | Path) -> None:
        """Writes the lens to one safetensors file."""
        facts = {"depths": self.depths, "last_depth": self.last_depth, "texts": self.texts}
        tensors = {"jacobians": self.jacobians, "activation_norms": self.activation_norms}
        write_tensors(path, _FORMAT, tensors, {"model": self.model_name, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, bridge: TransformerBridge) -> Self:
        """Returns the lens of a file that `save` wrote, or of one in the published format.

        That is a `.pt` file of the reference implementation or of TransformerLens, with `J`, a Jacobian for each layer
        whose block the stream leaves. Tensors and plain data alone are read of it, and no code in it runs.

        Args:
            path: The file.
            bridge: The model that the lens is for.

        Raises:
            InvalidArgumentError: The file holds no Jacobian lens, or one for a model of another width or depth.
            FileNotFoundError: There is no such file.
        """
        check_bridge(bridge)
        if path_of(path).suffix == ".pt":
            lens = cls(**_published(path_of(path), bridge.cfg.n_layers))
        else:
            tensors, metadata = read_tensors(path, _FORMAT, what="Jacobian lens", written_by="JacobianLens.save")
            facts = json.loads(metadata["facts"])
            facts["depths"] = tuple(facts["depths"])
            lens = cls(**tensors, **facts, model_name=metadata["model"])
        lens.check_fits(bridge)
        return lens

    # --- as a result -------------------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Returns one row for each depth."""
        norms, root = self.jacobians.flatten(1).norm(dim=1), self.d_model**0.5
        traces = self.jacobians.diagonal(dim1=1, dim2=2).sum(1)
        return {
            "depth": list(self.depths),
            "stream": [depth_names(self.n_layers)[depth] for depth in self.depths],
            "norm": (norms / root).tolist(),
            "cosine": (traces / (norms * root)).nan_to_num().tolist(),
        }

    def chart(self) -> LineChart:
        """Returns the table's numbers by depth."""
        columns = self.columns()
        series = {name: [float(str(one)) for one in columns[name]] for name in ("norm", "cosine")}
        return LineChart(series, self.depths, "depth", "ratio", self.title)


def _published(path: Path, n_layers: int) -> dict[str, Any]:
    """Returns the fields of a lens whose file has a Jacobian for each layer."""
    data = read_published(path, what="Jacobian lens")
    check_fields("Jacobian lens", data, "J", "d_model", "n_prompts")
    found = {int(layer) + 1: one for layer, one in sorted(data["J"].items())}
    width, metadata = data["d_model"], data.get("metadata") or {}
    target = metadata.get("target_layer", n_layers - 1)
    wrong = [depth for depth, one in found.items() if one.shape != (width, width) or not 0 < depth < n_layers]
    if wrong or not found or target != n_layers - 1:
        raise InvalidArgumentError(
            f"the Jacobian lens in {path.name} does not fit the model",
            expected=f"[{width}, {width}] for layers of 0 to {n_layers - 2}, by the last of {n_layers} layers",
            got=f"layers {[depth - 1 for depth in found]}, by layer {target}",
        )
    return {
        "jacobians": torch.stack([one.float() for one in found.values()]),
        "depths": tuple(found),
        "activation_norms": torch.full((len(found),), torch.nan),
        "last_depth": n_layers,
        "texts": int(data["n_prompts"]),
        "model_name": str(metadata.get("model_name") or "a published model"),
    }


def _ids(bridge: TransformerBridge, tokens: Tokens) -> Int[Tensor, "token"]:
    """Returns one token or several as ids."""
    given = [tokens] if isinstance(tokens, str | int) else tokens
    count = len(given) if isinstance(given, Sequence | Tensor) else -1
    if not count:
        raise InvalidArgumentError(f"tokens={tokens!r}", expected="one token or several")
    return target_ids_of(bridge, given, count, "tokens")  # pyright: ignore[reportArgumentType]
