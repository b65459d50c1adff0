"""A model with code of its own, whose config has none of the usual entries: what a checkpoint with remote code is."""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from clearspan.architectures import ArchitectureAdapter, parts


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, width=48, heads=4, depth=2, inner=80, positions=64, vocabulary=97, **others):
        super().__init__(**others)
        self.width, self.heads, self.depth, self.inner = width, heads, depth, inner
        self.positions, self.vocabulary = positions, vocabulary


class OwnAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x, mask):
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return self.out((torch.softmax(scores + mask, -1) @ v).transpose(1, 2).flatten(2))


class OwnFeed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first, self.second = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention, self.feed = OwnAttention(config), OwnFeed(config)

    def forward(self, x, mask):
        x = x + self.attention(self.first(x), mask)
        return x + self.feed(self.second(x))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.words, self.places = nn.Embedding(config.vocabulary, config.width), nn.Embedding(64, config.width)
        self.stack = nn.ModuleList(OwnBlock(config) for _ in range(config.depth))
        self.last, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, config.vocabulary, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=False,
    ):
        words = self.words(input_ids) if inputs_embeds is None else inputs_embeds
        length = words.shape[1]
        where = torch.arange(length)[None] if position_ids is None else position_ids
        x = words + self.places(where)
        mask = torch.full((length, length), -1e9).triu(1)[None, None]
        if attention_mask is not None:
            mask = mask + (1.0 - attention_mask[:, None, None].to(x.dtype)) * -1e9
        for block in self.stack:
            x = block(x, mask)
        return CausalLMOutputWithPast(logits=self.head(self.last(x)))


class SquashedBlock(nn.Module):
    """A block that multiplies the stream, and adds nothing to it."""

    def __init__(self, config):
        super().__init__()
        self.map = nn.Linear(config.width, config.width)

    def forward(self, x, mask):
        return x * torch.sigmoid(self.map(x))


class SquashedForCausalLM(OwnForCausalLM):
    """A model of which no structure can be found, whatever is learned about blocks that are sums."""

    def __init__(self, config):
        super().__init__(config)
        self.stack[1] = SquashedBlock(config)


def own_model(**settings):
    torch.manual_seed(0)
    model = OwnForCausalLM(OwnConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


class OwnArchitectureAdapter(ArchitectureAdapter):
    """A model of one's own."""

    whole_sequences = "it keeps no keys and values"
    sizes = {  # noqa: RUF012
        "d_model": ("width",),
        "n_heads": ("heads",),
        "n_layers": ("depth",),
        "d_vocab": ("vocabulary",),
        "n_ctx": ("positions",),
        "d_mlp": ("inner",),
        "act_fn": "relu",
        "eps": (),
    }

    def mapping(self, cfg):
        blocks = parts.block(
            "stack",
            ln1=parts.norm("first"),
            attn=parts.attention("attention", q="query", k="key", v="value", o="out"),
            ln2=parts.norm("second"),
            mlp=parts.mlp("feed", in_="up", out="down"),
        )
        return parts.decoder(
            embed="words", pos_embed="places", blocks=blocks, ln_final=parts.norm("last"), unembed="head"
        )
