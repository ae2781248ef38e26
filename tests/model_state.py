"""State of a model and of the current thread, to compare before and after a call."""

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def hooks_of(module):
    return [(name, list(hooks)) for name, hooks in vars(module).items() if "hooks" in name and isinstance(hooks, dict)]


def raw(tensor):
    return None if tensor is None else tensor.detach().numpy().tobytes()


saved_tensor_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)  # older torch has none
FLAGS = ("training", "grad_checkpointing", "fused_attn")


def state_of(model):
    """Return everything that a call could leave behind on a model or in the current thread."""
    modules, parameters = list(model.modules()), list(model.parameters())
    return {
        "weights": {name: raw(t) for name, t in model.state_dict().items()},
        "grad": [(id(p.grad), raw(p.grad)) for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "flags": [[getattr(m, flag, None) for flag in FLAGS] for m in modules],
        "attributes": [set(vars(m)) for m in modules],
        "forward": [vars(m).get("forward") for m in modules],
        "module hooks": list(map(hooks_of, modules)),
        "tensor hooks": [p._backward_hooks for p in parameters],
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "random numbers": raw(torch.get_rng_state()),
        "function modes": list(_get_current_function_mode_stack()),
        "dispatch modes": list(_get_current_dispatch_mode_stack()),
        "saved tensor hooks": saved_tensor_hooks(True),
        "functions": (F.scaled_dot_product_attention, torch.nn.Module.__call__),
    }
