"""What must be as it was after a run, however it ended."""

import signal

import torch

from clearspan.interrupts import _INTERRUPTS
from clearspan.scopes import HERE


class Cleanliness:
    """The state of a bridge's model and of this thread, before a run and after it.

    Args:
        bridge: The bridge.
        tokens: An input whose logits must stay the same.
    """

    def __init__(self, bridge, tokens):
        self.bridge, self.tokens = bridge, tokens
        self.logits = bridge.hf_model(tokens, use_cache=False).logits.detach()
        self.before = self.state()
        self.tensors = {
            name: (tensor, tensor._version) for name, tensor in bridge.hf_model.state_dict(keep_vars=True).items()
        }

    def state(self):
        """Returns what can be compared, by name."""
        bridge, model = self.bridge, self.bridge.hf_model
        modules = list(model.modules())
        return {
            "listeners": [point.name for point in bridge.index if point.is_listening],
            "taps": list(bridge.taps._installed),
            "torch hooks": [
                (name, len(module._forward_hooks), len(module._forward_pre_hooks))
                for name, module in model.named_modules()
                if module._forward_hooks or module._forward_pre_hooks
            ],
            "forwards": [type(module).__name__ for module in modules if "forward" in vars(module)],
            "configs": sorted(
                {type(vars(module)["config"]).__name__ for module in modules if "config" in vars(module)}
            ),
            "config": model.config.to_dict(),
            "training": [module.training for module in modules],
            "requires grad": [parameter.requires_grad for parameter in model.parameters()],
            "gradients": sum(parameter.grad is not None for parameter in model.parameters()),
            "position": {(point.position, point.step, point.width) for point in bridge.index},
            "pending": list(bridge.taps._passage.pending),
            "rows": dict(bridge.taps._passage.rows),
            "turn": (bridge.taps.turns._owner, bridge.taps.turns._call, list(bridge.taps.turns.opened)),
            "scope": HERE.get(),
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "function modes": torch._C._len_torch_function_stack(),
            "dispatch modes": torch._C._len_torch_dispatch_stack(),
            "interrupts": (_INTERRUPTS.depth, _INTERRUPTS.are_let_through, _INTERRUPTS.is_waiting),
            "handler": signal.getsignal(signal.SIGINT),
        }

    def faults(self):
        """Returns the names of what is not as it was."""
        now = self.state()
        found = [f"{name}: {now[name]!r}"[:200] for name, value in self.before.items() if now[name] != value]
        for name, tensor in self.bridge.hf_model.state_dict(keep_vars=True).items():
            was, version = self.tensors[name]
            if tensor is not was or tensor._version != version:
                found.append(name)
        with torch.enable_grad():
            logits = self.bridge.hf_model(self.tokens, use_cache=False).logits
        if not torch.equal(logits, self.logits):
            found.append("logits")
        return found
