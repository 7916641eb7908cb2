"""Writes a file with tensors of every kind that checkpoints have, by whatever PyTorch runs this:

    python tests/storage/pytorch/torch_files.py FOLDER

`files/` holds what PyTorch 1.13.1 (Debian 12's python3-torch) wrote; the tests write those of the installed one.
"""

import argparse
import collections
import sys

import torch


def saved():
    torch.manual_seed(0)
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = collections.OrderedDict(
        float32=base,
        transposed=base.transpose(0, 2),
        view=base[1:, 1:],
        float16=base.half(),
        bfloat16=base.bfloat16(),
        float64=base.double(),
        int64=base.long(),
        uint8=base.byte(),
        bool=base > 3,
        complex64=torch.complex(base, base),
        parameter=torch.nn.Parameter(base.clone()),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        expanded=torch.ones(1).expand(3, 2),
    )
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {
        "state_dict": tensors,
        "module": module.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "others": [1, (2, "text"), None, True, 2**70, -1.5, {3: b"bytes"}],
    }


def write(folder, release):
    """Files in the zip format of each protocol, and one in the format before 1.6."""
    torch.save(saved(), f"{folder}/torch{release}-zip.pth")
    torch.save(saved(), f"{folder}/torch{release}-legacy.pth", _use_new_zipfile_serialization=False)
    for protocol in (3, 4, 5):
        torch.save(saved(), f"{folder}/torch{release}-p{protocol}.pth", pickle_protocol=protocol)


if __name__ == "__main__":
    write(sys.argv[1], ".".join(torch.__version__.split(".")[:2]))
