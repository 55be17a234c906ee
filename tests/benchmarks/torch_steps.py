"""The peer in training: DenseNet-121 in PyTorch, channels last; eager, as advised on CPUs, or compiled for GPUs.

Runs in the peers' own environment, which has no torchvision: the network is written out after Huang et al. 2017
(arXiv:1608.06993) with torchvision's layer settings, and holds as many weights as Keras's.

    python torch_steps.py --precision mixed_bfloat16 --size 224 --batch 16 --steps 3 --threads 2
    python torch_steps.py --device cuda --compile --precision mixed_bfloat16 --batch 64
    python torch_steps.py --threads 1 --ranks 2 --rank 0      # DistributedDataParallel: every rank answers
"""

import argparse
import os
import time
from contextlib import nullcontext

import torch
from party import serve
from torch import nn


class DenseLayer(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 128, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(pieces, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class DenseNet121(nn.Module):
    def __init__(self, findings: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.blocks, self.transitions, channels = nn.ModuleList(), nn.ModuleList(), 64
        for number, layers in enumerate((6, 12, 24, 16)):
            self.blocks.append(nn.ModuleList(DenseLayer(channels + 32 * layer) for layer in range(layers)))
            channels += 32 * layers
            tail = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if number < 3:
                tail += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
            self.transitions.append(nn.Sequential(*tail))
        self.head = nn.Linear(channels, findings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            pieces = [x]
            for layer in block:
                pieces.append(layer(pieces))
            x = transition(torch.cat(pieces, 1))
        return self.head(x.mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("size", 224), ("batch", 16), ("steps", 3), ("threads", 2), ("ranks", 1), ("rank", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--port", default="29511")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    if asked.ranks > 1:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[asked.rank]})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": asked.port, "GLOO_SOCKET_IFNAME": "lo"}
        torch.distributed.init_process_group("gloo", rank=asked.rank, world_size=asked.ranks)

    torch.set_default_device(asked.device)
    # What is compiled for one shape of input is what a training with full batches needs.
    torch.backends.cudnn.benchmark = True
    model = DenseNet121(14).to(memory_format=torch.channels_last)
    if asked.ranks > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if asked.compile:
        model = torch.compile(model)
    loss_function = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    kind = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}.get(asked.precision)
    half = torch.autocast(asked.device, kind) if kind else nullcontext()
    scaler = torch.amp.GradScaler(asked.device, enabled=kind is torch.float16)
    mean, deviation = (torch.tensor(v)[None, :, None, None] for v in ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]))
    grey = torch.randint(0, 256, (asked.batch, 1, asked.size, asked.size), dtype=torch.uint8)
    labels = (torch.rand(asked.batch, 14) < 0.1).float()

    def step() -> torch.Tensor:
        radiographs = ((grey.float() - mean) / deviation).contiguous(memory_format=torch.channels_last)
        with half:
            loss = loss_function(model(radiographs).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    def measure() -> dict:
        began = time.perf_counter()
        for _ in range(asked.steps):
            loss = step()
        # A GPU is done when its last loss can be read.
        loss.item()
        rate = asked.steps * asked.batch / (time.perf_counter() - began)
        return {"value": rate, "with": f"PyTorch {torch.__version__}"}

    for _ in range(2):
        step().item()
    serve(measure)


if __name__ == "__main__":
    main()
