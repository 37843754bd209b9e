"""Writes checkpoint.pth.tar, a PyTorch checkpoint as a training script leaves it:
python tests/data/make_checkpoint.py

Its network is checkpoint.json's; its weights are hashed with the salt `checkpoint`, so that a test
knows them without PyTorch. Needs cargo, torch and safetensors.
"""

import pathlib
import subprocess
import sys
import tempfile
from collections import OrderedDict

import torch
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
with tempfile.TemporaryDirectory() as folder:
    model = pathlib.Path(folder) / "m.safetensors"
    prism = subprocess.run([HERE.parent.parent / "scripts/built", "prism", "build", "--release"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([prism, "weights", "--salt", "checkpoint", "--network", HERE / "checkpoint.json", "-o", model], check=True, stdout=sys.stderr)
    weights = load_file(model)
state = OrderedDict((f"module.{name}", tensor.clone()) for name, tensor in weights.items())
# Released checkpoints carry a layer that the network does not use.
state["module.mask_decoder.decoder.final_conv.weight"] = torch.zeros(2, 4, 1, 1, 1)
state["module.mask_decoder.decoder.final_conv.bias"] = torch.zeros(2)
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))], lr=4e-5)
optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
optimizer.step()
checkpoint = {"epoch": 3, "best_val_loss": 0.25, "model_state_dict": state, "optimizer": optimizer.state_dict()}
torch.save(checkpoint, HERE / "checkpoint.pth.tar")
