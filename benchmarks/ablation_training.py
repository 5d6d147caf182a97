"""Training a small model from images that lie on its device, as one CUDA graph a step where that pays."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from megadual.run.config import OptimConfig
from megadual.vision import DualToken
from megadual.vision.optim import adamw, learning_rate, set_learning_rate

EAGER_STEPS = 3  # before a step is captured: kernels are compiled and the optimizer's state is made


def random_crops(images_B3hw: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 -> [-1, 1], each image cropped to a random 90 to 100 % of its area and resized back (bicubic)."""
    x = images_B3hw.float() / 127.5 - 1
    side_B, x_B, y_B = torch.rand(3, len(x), device=x.device, generator=generator)
    side_B = (0.9 + 0.1 * side_B).sqrt()
    shift_B2 = (2 * torch.stack([x_B, y_B], dim=1) - 1) * (1 - side_B)[:, None]
    theta_B23 = torch.cat([torch.eye(2, device=x.device) * side_B[:, None, None], shift_B2[:, :, None]], dim=2)
    grid = F.affine_grid(theta_B23, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def fit(
    model: nn.Module,
    images: Tensor,
    batch: int,
    steps: int,
    lr: float,
    seed: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    name: str,
    capture: bool = False,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Minimise loss_of(crops, their indices) with AdamW, warmup and cosine; returns seconds a step, start-up left out.

    With `capture` a step is one CUDA graph on a GPU: such small models leave it waiting for launches otherwise.
    `after_step` is called between steps and never captured.
    """
    config = OptimConfig(lr=lr, beta2=0.99, weight_decay=1e-4, warmup_steps=min(200, steps // 10))
    optimizer, rate = adamw([model], config), torch.zeros((), device=images.device)
    capture = capture and images.is_cuda
    if capture:  # a graph reads the learning rate and counts its steps on the GPU
        for group in optimizer.param_groups:
            group.update(lr=rate, capturable=True)
    generator = torch.Generator(images.device).manual_seed(seed)
    crops = torch.empty(batch, *images.shape[1:], device=images.device)
    chosen = torch.zeros(batch, dtype=torch.int64, device=images.device)

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda, cache_enabled=not capture):
            loss = loss_of(crops, chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    graph = None
    for done in trange(steps, desc=name, unit="step", mininterval=10):
        if done == min(EAGER_STEPS + 1, steps - 1):  # what comes before compiles and captures
            begun, start = done, time.perf_counter()
        chosen.random_(len(images), generator=generator)
        crops.copy_(random_crops(images[chosen], generator))
        value = learning_rate(config, done, steps)
        rate.fill_(value) if capture else set_learning_rate(optimizer, value)
        if not capture:
            loss = step()
        elif done < EAGER_STEPS:  # on a stream of its own, as capturing asks for
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                loss = step()
            torch.cuda.current_stream().wait_stream(side)
        else:
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    loss = step()
            graph.replay()
        after_step()
    if not loss.isfinite():
        raise RuntimeError(f"{name}: the last loss is {loss.item()}")
    return (time.perf_counter() - start) / (steps - begun)


class CodebookUpdates:
    """Moves a tokenizer's codebooks between steps, from what their quantisers were last given.

    Their restarts draw from the host's generator, which a captured step can't; so in a step they only quantise.
    """

    def __init__(self, model: DualToken):
        self.quantizers = list(model.quantizers.values())
        self.given: dict[nn.Module, Tensor] = {}
        for quantizer in self.quantizers:
            quantizer.eval()
            quantizer.register_forward_pre_hook(self._keep)

    def _keep(self, quantizer: nn.Module, arguments: tuple[Tensor]) -> None:
        self.given[quantizer] = arguments[0].detach()

    @torch.no_grad()
    def __call__(self) -> None:
        for quantizer in self.quantizers:
            quantizer.train()(self.given[quantizer])
            quantizer.eval()
