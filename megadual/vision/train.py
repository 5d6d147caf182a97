"""Training a DualToken tokenizer: the teacher's features, reconstruction, LPIPS and GAN (paper sections A4, A5).

Works as one process and as several (DDP; codebook statistics are global). A checkpoint holds everything, the
discriminator and the position in the data too, so a resumed run goes on as if it had not stopped.
"""

import contextlib
import copy
import time
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megadual.run.bad_loss import StepResult
from megadual.run.log import RunLog
from megadual.run.ranks import Ranks
from megadual.run.session import session

from .data import read_pairs
from .discriminator import Discriminator
from .loop import Trainer, fit, judged
from .losses import adaptive_weight, discriminator_loss, distillation, generator_loss
from .lpips import LPIPS
from .metrics import perplexity
from .optim import adamw, clip, learning_rate, set_learning_rate
from .pictures import comparison_grid
from .quantizer import Codebook
from .recipe import TrainTokenizerConfig, applies, build, check, frozen_modules
from .tokenizer import DualTokenOutput, finish, hidden_states


class TokenizerTrainer(Trainer):
    """The modules, optimisers and data of a run; `step` does one optimiser step of each."""

    def __init__(self, config: TrainTokenizerConfig, ranks: Ranks):
        check(config)
        super().__init__(config, ranks)
        torch.manual_seed(config.train.seed)  # equal on all ranks, so that they start from equal weights
        self.model, self.teacher = build(config)
        self.model.to(ranks.device)
        self.teacher.to(ranks.device)
        self.discriminator = Discriminator(config.gan.channels, config.gan.norm_groups).to(ranks.device)
        self.lpips = LPIPS().to(ranks.device) if config.train.loss.lpips > 0 else None
        self.codebooks = [module for module in self.model.modules() if isinstance(module, Codebook)]
        self.optimizer = adamw([self.model], config.train)
        self.gan_optimizer = adamw([self.discriminator], config.gan)
        self.parts = {
            "model": self.model,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "gan_optimizer": self.gan_optimizer,
        }
        torch.manual_seed(config.train.seed * 1009 + ranks.rank)
        self._set_modes()
        self.train_model, self.train_discriminator = self.model, self.discriminator
        if ranks.size > 1:
            # Buffers are the codebooks' statistics, which the quantisers keep equal themselves.
            self.train_model = DistributedDataParallel(self.model, broadcast_buffers=False)
            self.train_discriminator = DistributedDataParallel(self.discriminator, broadcast_buffers=False)

    def _set_modes(self) -> None:
        """Training mode, except for frozen modules: a frozen quantiser's codebook must not move."""
        self.model.train()
        for module in frozen_modules(self.model, self.config.train.freeze):
            module.eval()

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    @property
    def reconstructs(self) -> bool:
        weights = self.config.train.loss
        return self.model.decoder is not None and max(weights.reconstruction, weights.lpips, weights.gan) > 0

    @property
    def _with_gan(self) -> bool:
        return self.reconstructs and applies(self.config.gan, self.config.train.loss.gan, self.steps_done)

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], DualTokenOutput]:
        """(total, unweighted terms, output) of one batch (paper section A4, stage 1)."""
        weights, config = self.config.train.loss, self.config
        layer, wanted = config.model.teacher_layer, (None, None)
        if layer is not None:
            with torch.no_grad():
                features = hidden_states(self.teacher, images, layer)[-1]
                wanted = features, finish(self.teacher, features, layer)
        output = self.train_model(images, reconstruct=self.reconstructs)
        terms = distillation(output, images, *wanted)
        if self.reconstructs and applies(config.lpips, weights.lpips, self.steps_done):
            some = slice(config.lpips.images)
            terms["lpips"] = self.lpips(output.reconstruction[some], images[some]).mean()
        total = sum(weights.of(name) * term for name, term in terms.items())
        if self._with_gan:
            self.discriminator.requires_grad_(False)
            terms["gan"] = generator_loss(self.discriminator(output.reconstruction[slice(config.gan.images)]))
            self.discriminator.requires_grad_(True)
            fidelity = terms["reconstruction"] + terms.get("lpips", 0.0)
            terms["gan_weight"] = adaptive_weight(fidelity, terms["gan"], self.model.decoder.conv_out.weight)
            total = total + terms["gan_weight"] * weights.gan * terms["gan"]
        return total, terms, output

    def step(self, approve: Callable[[StepResult], bool] | None = None) -> dict[str, float]:
        """One optimiser step over `train.accumulate` batches per rank; returns its metrics.

        A step that `approve` refuses changes no weight and no codebook.
        """
        config, start = self.config.train, time.perf_counter()
        lr = learning_rate(config, self.steps_done, config.steps)
        set_learning_rate(self.optimizer, lr)
        with_gan, quantizers = self._with_gan, self.model.quantizers
        self.keys = []
        before = copy.deepcopy([codebook.state_dict() for codebook in self.codebooks]) if approve else []
        restarted = {stream: quantizer.restarted for stream, quantizer in quantizers.items()}
        sums: dict[str, float] = {}
        images_seen = 0
        for i in range(config.accumulate):
            images = self.next_batch().pixels(self.ranks.device)
            images_seen += len(images)
            last = i == config.accumulate - 1
            with self._synchronised(self.train_model, last):
                with self._autocast():
                    total, terms, output = self.losses(images)
                (total / config.accumulate).backward()
            if with_gan:
                with self._synchronised(self.train_discriminator, last):
                    terms["discriminator"] = self._discriminator_loss(images, output.reconstruction.detach())
                    (terms["discriminator"] / config.accumulate).backward()
            for name, value in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item() / config.accumulate
        metrics = {**sums, "grad_norm": clip([self.model], config.clip_grad), "lr": lr, **self._code_metrics(output)}
        for stream, quantizer in quantizers.items():  # equal on all ranks
            metrics[f"restarted_{stream}"] = quantizer.restarted - restarted[stream]
        metrics = self.ranks.mean(metrics)
        if approve is None or approve(judged(metrics)):
            self.optimizer.step()
            if with_gan:
                self._step_discriminator()
        else:
            for codebook, state in zip(self.codebooks, before, strict=True):
                codebook.load_state_dict(state)
        self.optimizer.zero_grad()
        self.gan_optimizer.zero_grad()
        self.steps_done += 1
        metrics["images_per_s"] = images_seen * self.ranks.size / (time.perf_counter() - start)
        return metrics

    def _synchronised(self, module: nn.Module, last: bool):
        """DistributedDataParallel averages gradients over ranks once, at the last batch that is accumulated."""
        return contextlib.nullcontext() if last or self.ranks.size == 1 else module.no_sync()

    def _discriminator_loss(self, images: Tensor, fake: Tensor) -> Tensor:
        some = slice(self.config.gan.images)
        with self._autocast():
            return discriminator_loss(*self.train_discriminator(torch.cat([images[some], fake[some]])).chunk(2))

    def _step_discriminator(self) -> None:
        gan = self.config.gan
        done, steps = self.steps_done - gan.start_step, self.config.train.steps - gan.start_step
        set_learning_rate(self.gan_optimizer, learning_rate(gan, done, steps))
        self.gan_optimizer.step()

    def _code_metrics(self, output: DualTokenOutput) -> dict[str, float]:
        """Share of the codebook that this batch uses on all ranks, and the perplexity: per stream and depth."""
        metrics = {}
        for stream, codes_BND in output.codes.items():
            size = self.config.model.streams[stream].codebook_size
            codes_by_depth = codes_BND.flatten(0, 1).T
            counts_DK = torch.stack([torch.bincount(codes, minlength=size) for codes in codes_by_depth])
            for depth, counts_K in enumerate(self.ranks.sum(counts_DK).float()):
                metrics[f"code_usage_{stream}/{depth}"] = (counts_K > 0).float().mean().item()
                metrics[f"perplexity_{stream}/{depth}"] = perplexity(counts_K)
        return metrics

    @torch.no_grad()
    def picture(self, images: Tensor) -> Image.Image:
        """A grid of these images beside their reconstructions."""
        self.model.eval()
        pictures = self.model.decode(self.model.encode(images.to(self.ranks.device), pooled=False).codes).cpu()
        self._set_modes()
        return comparison_grid(images, pictures)


def train(config: TrainTokenizerConfig) -> dict[str, float]:
    """Train to `train.steps` and write `run.dir`/dualtoken; returns the last step's metrics (`fit`)."""
    with session(config.run, config) as opened:
        trainer = TokenizerTrainer(config, opened.ranks)
        images = None
        if config.data.heldout and opened.ranks.main and trainer.model.decoder is not None:
            images, _ = read_pairs(config.data.heldout, config.model.image_size, limit=32)

        def show(log: RunLog) -> None:
            if images is not None:
                picture = trainer.picture(images)
                picture.save(opened.folder / f"reconstructions-{trainer.steps_done:08d}.png")
                log.picture(trainer.steps_done, "reconstructions", picture)

        metrics = fit(config, trainer, opened, show)
        if opened.ranks.main:
            trainer.model.save_pretrained(opened.folder / "dualtoken")
    return metrics
