"""transformers' types, for annotations. Other packages import this under `TYPE_CHECKING` alone."""

from transformers import Cache as Cache
from transformers import PretrainedConfig as PretrainedConfig
from transformers import PreTrainedModel as PreTrainedModel
from transformers import PreTrainedTokenizerBase as PreTrainedTokenizerBase
