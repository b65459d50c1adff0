"""Types of transformers by which other packages annotate. Import them under `TYPE_CHECKING` alone: loading this is slow."""

from transformers import Cache as Cache
from transformers import PretrainedConfig as PretrainedConfig
from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
