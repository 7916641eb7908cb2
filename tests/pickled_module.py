"""A whole `torch.nn.Module` with the names of TNT, to be pickled."""

import torch
from state_dicts import as_torch, state_dict


def whole():
    """TNT-Ti's tensors in timm's layout, each where its name says, as modules in modules."""
    tensors = as_torch(state_dict("timm", "tnt_ti_patch16_224", image_size=32, num_classes=10))
    tensors["cls_token"] = torch.full((1, 1, 192), 2.0)
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, torch.nn.Parameter(tensor))
    return root
