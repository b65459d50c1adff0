# %% [markdown]
# # The state of a game, read and rewritten
#
# A model that is trained on nothing but lists of moves may come to keep the board. This notebook trains a small
# transformer on a game, in well under a minute, finds the board in its residual stream with linear probes, and
# rewrites it: after one square is changed along a probe's direction, the model should predict the moves that are
# legal on the changed board.
#
# ## The game
#
# Two players take turns on a board of 3 × 3 squares. Black starts with the upper left square, white with the lower
# right one. A move takes a square next to one of one's own (up, down, left or right) that is not yet one's own, so
# that squares change hands often. Who has no square left may take any.
#
# A move is one token, the number of the square. Who has a square stands in no token: it depends on whether the last
# move there was at an odd or an even place in the list, and what is legal depends on the whole board.

# %%
import functools

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import clearspan
from clearspan.plots import heatmap, lines

SQUARES, LENGTH, START = 9, 16, 9  # START is the token that begins a game
MINE, EMPTY, THEIRS = 1, 0, -1
near = torch.tensor(
    [[abs(i // 3 - j // 3) + abs(i % 3 - j % 3) == 1 for j in range(SQUARES)] for i in range(SQUARES)]
).float()


def legal_moves(board):
    """Returns what the player to move may take on boards as that player sees them, `[..., square]`."""
    mine = board == MINE
    reached = (mine.float() @ near > 0) & ~mine
    return torch.where(mine.any(-1, keepdim=True), reached, ~mine)


def play(games, draw):
    """Returns random moves `[game, move]`, and the boards before each move as the player to move sees them."""
    board = torch.zeros(games, SQUARES, dtype=torch.long)
    board[:, 0], board[:, -1] = MINE, THEIRS
    moves, boards = [], []
    for _ in range(LENGTH):
        boards.append(board)
        moves.append(torch.multinomial(legal_moves(board).float(), 1, generator=draw)[:, 0])
        board = -board.scatter(1, moves[-1][:, None], MINE)
    return torch.stack(moves, 1), torch.stack(boards, 1)


def before(moves):
    """Returns the tokens that predict each move: the start, and all moves but the last."""
    return torch.cat([torch.full_like(moves[:, :1], START), moves[:, :-1]], 1)


# %% [markdown]
# ## A model that plays
#
# A GPT-2 of three layers learns to predict the next move of games that are played at random. It is never told the
# rules or the board.


# %%
def train(steps=1000, games=64, rate=3e-3):
    """Returns a model trained on random games."""
    torch.manual_seed(0)
    sizes = {"vocab_size": SQUARES + 1, "n_positions": LENGTH, "n_embd": 64, "n_layer": 3, "n_head": 4}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": START, "eos_token_id": START}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        moves, _ = play(games, draw)
        logits = model(input_ids=before(moves), use_cache=False).logits[..., :SQUARES]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), moves.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


bridge = clearspan.boot(train())
moves, boards = play(1000, torch.Generator().manual_seed(2))
logits, cache = bridge.run_with_cache(before(moves))
probs = logits[..., :SQUARES].softmax(-1)
illegal = (probs * ~legal_moves(boards)).sum(-1)
print(f"probability of illegal moves: {illegal.mean():.2f}; a guess: {1 - legal_moves(boards).float().mean():.2f}")

# %% [check]
assert illegal.mean() < 0.06
assert legal_moves(boards).any(-1).all()

# %% [markdown]
# ## Where is the board?
#
# At each depth of the residual stream a linear map is fitted to say whether each square is mine, empty or theirs, and
# is tested on games that it has not seen. *Mine* is the player's whose turn it is. As a comparison, another asks for
# black, empty or white, which is the same board in other words.

# %%
streams = torch.cat([torch.stack([cache["resid_pre", layer] for layer in range(3)]), cache["resid_post", 2][None]])
TRAIN, TEST = slice(0, 700), slice(700, 1000)
places = slice(2, LENGTH)  # from the third move on
black = boards * torch.tensor([1, -1] * (LENGTH // 2))[:, None]


def with_one(stream):
    """Returns vectors with a 1 at their end, for the bias."""
    return torch.cat([stream, torch.ones_like(stream[..., :1])], -1)


def fit(stream, state):
    """Returns the weights `[d_model + 1, square, 3]` that are best in the least squares, over games for training."""
    x = with_one(stream[TRAIN, places]).flatten(0, 1)
    y = torch.nn.functional.one_hot(state[TRAIN, places] + 1, 3).float().reshape(len(x), -1)
    return torch.linalg.lstsq(x, y).solution.reshape(-1, SQUARES, 3)


def accuracy(stream, state):
    """Returns the share of squares that a probe names, by square, on games that it has not seen."""
    said = torch.einsum("gpd,dsk->gpsk", with_one(stream[TEST, places]), fit(stream, state)).argmax(-1) - 1
    return (said == state[TEST, places]).float().mean((0, 1))


depths = ["embedding", *(f"after block {layer}" for layer in range(3))]
by_square = torch.stack([accuracy(stream, boards) for stream in streams])
as_colours = torch.stack([accuracy(stream, black) for stream in streams])
lines(
    {"mine or theirs": by_square.mean(1).tolist(), "black or white": as_colours.mean(1).tolist()},
    x=depths,
    x_title="depth",
    value_title="share of squares that the probe names",
)

# %% [markdown]
# The embedding knows one move alone. Block by block the rest of the board is added. The model keeps it from the point
# of view of the player to move: asked for black and white, the same probe does worse. That is reasonable, since what
# is legal depends on whose turn it is, but it has to be known before one can find a board at all.

# %%
heatmap(
    by_square,
    x=[f"{i // 3},{i % 3}" for i in range(SQUARES)],
    y=depths,
    x_title="square: row, column",
    y_title="depth",
    name="accuracy",
    title="accuracy",
    span=(0.5, 1.0),
)

# %% [check]
assert by_square[2].mean() > 0.9
assert by_square[1:].mean(1).min() > by_square[0].mean() + 0.1
assert by_square[2].mean() > as_colours[2].mean() + 0.01

# %% [markdown]
# ## Is it what the model uses?
#
# A probe finds what can be read, and not what *is* read. So rewrite it: make a square of theirs mine, and compare
# with the rules on the changed board. The direction is the one in which streams change with what the probe reads, the
# covariance of the streams times the probe's weights. (The weights alone are a poor direction to push in: they are
# bent away from whatever else varies.) A step of 1 turns the probe's reading round. It is made at the last move
# alone.

# %%
AT = 10  # the place in the list of moves


@functools.cache
def rewriting(depth):
    """Returns the probe from theirs to mine `[d_model + 1, square]`, and the directions to push in."""
    weights = fit(streams[depth], boards)
    weights = weights[..., 2] - weights[..., 0]
    return weights, torch.cov(streams[depth][TRAIN, places].flatten(0, 1).T) @ weights[:-1]


def rewritten(depth, square, games, factor, seed=None):
    """Returns the probabilities of moves at place AT with a square of theirs made mine at a depth.

    With a seed the step has the same length and a random direction.
    """
    weights, directions = rewriting(depth)
    direction = directions[:, square]
    margin = with_one(streams[depth][games, AT]) @ weights[:, square]
    step = -2 * factor * margin[:, None] * direction / (direction @ weights[:-1, square])
    if seed is not None:
        other = torch.randn(len(direction), generator=torch.Generator().manual_seed(seed))
        step = step.norm(dim=-1, keepdim=True) * other / other.norm()

    def rewrite(resid, hook):
        resid[:, AT] += step

    tokens = before(moves)[games]
    edited = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{depth - 1}.hook_resid_post", rewrite)])
    return edited[:, AT, :SQUARES].softmax(-1)


def wrong(depth, factor, seed=None):
    """Returns the mean probability of moves that are illegal on the changed boards, over squares and games."""
    found = []
    for square in range(SQUARES):
        games = (boards[TEST, AT, square] == THEIRS).nonzero()[:, 0] + TEST.start
        after = boards[games, AT].clone()
        after[:, square] = MINE
        found.append((rewritten(depth, square, games, factor, seed) * ~legal_moves(after)).sum(-1))
    return torch.cat(found).mean().item()


factors = [0.0, 0.5, 1.0, 1.5, 2.0]
curves = {depths[depth]: [wrong(depth, factor) for factor in factors] for depth in (1, 2, 3)}
curves["after block 1, random"] = [wrong(2, factor, seed=3) for factor in factors]
lines(
    curves,
    x=factors,
    x_title="length of the step (1 turns the probe's reading round)",
    value_title="probability of illegal moves",
)

# %% [check]
assert curves["after block 1"][2] < 0.7 * curves["after block 1"][0]
assert curves["after block 2"][2] < 0.5 * curves["after block 2"][0]
assert curves["after block 0"][2] > curves["after block 1"][2]
assert min(curves["after block 1, random"]) > 0.9 * curves["after block 1, random"][0]

# %% [markdown]
# Without a step the model predicts for the real board, and puts about a fifth of its probability on moves that are
# illegal on the changed one. Rewritten after block 1, that is halved, and a step of the same length in a random
# direction does nothing of the kind. After block 0 little is gained: the board is not complete there, and block 1
# adds to it from moves that were not rewritten. After block 2 most is gained, but there only the unembedding comes
# after, so that the step may as well act on the moves themselves as on the board.
#
# One game, before and after:

# %%
game = int(((boards[TEST, AT] == THEIRS).sum(-1) == 4).nonzero()[0]) + TEST.start
square = int((boards[game, AT] == THEIRS).nonzero()[0])
after = boards[game, AT].clone()
after[square] = MINE
rows = {
    "legal, real board": legal_moves(boards[game, AT]) / legal_moves(boards[game, AT]).sum(),
    "model": probs[game, AT],
    "model, rewritten": rewritten(2, square, torch.tensor([game]), 1.0)[0],
    "legal, changed board": legal_moves(after) / legal_moves(after).sum(),
}
heatmap(
    torch.stack(list(rows.values())),
    x=[f"{i // 3},{i % 3}{' (rewritten)' if i == square else ''}" for i in range(SQUARES)],
    y=list(rows),
    x_title="move: row, column",
    name="probability",
    title="probability",
)

# %% [markdown]
# ## What it does not show
#
# - A probe of 64 dimensions and 27 outputs may find what the model never uses. The intervention is the test, and it
#   is one depth, one kind of change.
# - The step is made at the last place alone. Later blocks read earlier places too, which still hold the old board.
#   What is left of the error may come from there.
# - A step that works says that the direction matters. It does not say that the model stores squares as independent
#   directions.
#
# References: Li et al. (2023), "Emergent World Representations", arXiv:2210.13382; Nanda et al. (2023), "Emergent
# Linear Representations in World Models of Self-Supervised Sequence Models", arXiv:2309.00941, for mine and theirs.
