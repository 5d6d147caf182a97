"""Training a DualToken tokenizer: the teacher's features, reconstruction, LPIPS and GAN (paper sections A4, A5).

Works as one process and under torchrun (DDP; codebook statistics are global). A checkpoint holds everything,
the discriminator and the position in the data too, so a resumed run goes on as if it had not stopped.
"""

import contextlib
import math
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from megadual.errors import UserError
from megadual.run.signals import EXIT_STOPPED, StopSignal

from .data import TrainingImages, read_pairs, training_batches
from .discriminator import Discriminator
from .loop import Ranks, RunLog, adamw, learning_rate, set_learning_rate
from .losses import adaptive_weight, discriminator_loss, distillation, generator_loss
from .lpips import LPIPS
from .metrics import perplexity
from .pictures import comparison_grid
from .recipe import TrainTokenizerConfig, applies, build, check, frozen_modules, newest_checkpoint
from .tokenizer import DualTokenOutput, finish, hidden_states


class TokenizerTrainer:
    """The modules, optimisers and data of a run; `step` does one optimiser step of each."""

    def __init__(self, config: TrainTokenizerConfig, ranks: Ranks):
        check(config)
        self.config, self.ranks = config, ranks
        torch.manual_seed(config.seed)  # equal on all ranks, so that they start from equal weights
        self.model, self.teacher = build(config)
        self.model.to(ranks.device)
        self.teacher.to(ranks.device)
        self.discriminator = Discriminator(config.gan.channels, config.gan.norm_groups).to(ranks.device)
        self.lpips = LPIPS().to(ranks.device) if config.loss.lpips > 0 else None
        self.optimizer = adamw([self.model], config.optim)
        self.gan_optimizer = adamw([self.discriminator], config.gan.optim)
        self.steps_done = 0
        self.data_state = {"batches": 0, "positions": {}}
        torch.manual_seed(config.seed * 1009 + ranks.rank)
        self._set_modes()
        self.train_model, self.train_discriminator = self.model, self.discriminator
        if ranks.size > 1:
            # Buffers are the codebooks' statistics, which the quantisers keep equal themselves.
            self.train_model = DistributedDataParallel(self.model, broadcast_buffers=False)
            self.train_discriminator = DistributedDataParallel(self.discriminator, broadcast_buffers=False)

    def _set_modes(self) -> None:
        """Training mode, except for frozen modules: a frozen quantiser's codebook must not move."""
        self.model.train()
        for module in frozen_modules(self.model, self.config.freeze):
            module.eval()

    def open_data(self) -> None:
        dataset = TrainingImages(
            self.config.data,
            self.config.model.image_size,
            self.config.seed,
            self.ranks.rank,
            self.ranks.size,
            self.data_state,
        )
        self.batches = training_batches(dataset)

    def _next_images(self) -> Tensor:
        batch = next(self.batches)
        self.data_state["batches"] += 1
        self.data_state["positions"][str(batch.stream)] = batch.position
        return batch.images.to(self.ranks.device, non_blocking=True)

    def _autocast(self):
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    def reconstructs(self) -> bool:
        weights = self.config.loss
        return self.model.decoder is not None and max(weights.reconstruction, weights.lpips, weights.gan) > 0

    @property
    def _with_gan(self) -> bool:
        return self.reconstructs and applies(self.config.gan, self.config.loss.gan, self.steps_done)

    def losses(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor], DualTokenOutput]:
        """(total, unweighted terms, output) of one batch (paper section A4, stage 1)."""
        weights, config = self.config.loss, self.config
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

    def step(self) -> dict[str, float]:
        """One optimiser step over `accumulate` batches per rank; returns its metrics."""
        config, start = self.config, time.perf_counter()
        lr = learning_rate(config.optim, self.steps_done, config.steps)
        set_learning_rate(self.optimizer, lr)
        with_gan, quantizers = self._with_gan, self.model.quantizers
        restarted = {stream: quantizer.restarted for stream, quantizer in quantizers.items()}
        sums: dict[str, float] = {}
        images_seen = 0
        for i in range(config.accumulate):
            images = self._next_images()
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
        most = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), most).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if with_gan:
            self._step_discriminator()
        self.steps_done += 1
        metrics = {**sums, "grad_norm": grad_norm, "lr": lr, **self._code_metrics(output)}
        for stream, quantizer in quantizers.items():  # equal on all ranks
            metrics[f"restarted_{stream}"] = quantizer.restarted - restarted[stream]
        metrics = self.ranks.mean(metrics)
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
        start, steps = self.config.gan.start_step, self.config.steps
        set_learning_rate(
            self.gan_optimizer, learning_rate(self.config.gan.optim, self.steps_done - start, steps - start)
        )
        self.gan_optimizer.step()
        self.gan_optimizer.zero_grad()

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

    def save(self, folder: Path) -> None:
        """Write `folder`/checkpoints/STEP.pt, all of the run's state; older ones beyond `keep_checkpoints` go."""
        states = self.ranks.gather({**self.data_state, "rng": torch.get_rng_state()})
        if not self.ranks.main:
            return
        checkpoints = folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.steps_done,
            "model": self.model.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gan_optimizer": self.gan_optimizer.state_dict(),
            "ranks": states,
        }
        path = checkpoints / f"{self.steps_done:08d}.pt"
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # a checkpoint is there whole or not at all
        for old in sorted(checkpoints.glob("*.pt"))[: -self.config.keep_checkpoints]:
            old.unlink()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; UserError where it does not fit this run."""
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.model.load_state_dict(state["model"])
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.gan_optimizer.load_state_dict(state["gan_optimizer"])
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint '{path}' can't be resumed ({reason}); move it or change output=") from error
        if len(state["ranks"]) != self.ranks.size:
            raise UserError(f"checkpoint '{path}' is of {len(state['ranks'])} ranks, this run has {self.ranks.size}")
        mine = state["ranks"][self.ranks.rank]
        torch.set_rng_state(mine["rng"])
        self.data_state = {"batches": mine["batches"], "positions": mine["positions"]}
        self.steps_done = state["step"]

    @torch.no_grad()
    def picture(self, images: Tensor) -> Image.Image:
        """A grid of these images beside their reconstructions."""
        self.model.eval()
        pictures = self.model.decode(self.model.encode(images.to(self.ranks.device), pooled=False).codes).cpu()
        self._set_modes()
        return comparison_grid(images, pictures)


def train(config: TrainTokenizerConfig) -> dict[str, float]:
    """Train to `config.steps` and write `output`/dualtoken; returns the last step's metrics.

    Exits with EXIT_STOPPED after SIGTERM or SIGUSR1, once a checkpoint is written.
    """
    ranks = Ranks.join()
    trainer = TokenizerTrainer(config, ranks)
    output = Path(config.output)
    newest = newest_checkpoint(output)
    if newest:
        trainer.load(newest)
        if ranks.main:
            print(f"resuming from {newest}", flush=True)
    trainer.open_data()
    images = None
    if config.pictures and ranks.main and trainer.model.decoder is not None:
        images, _ = read_pairs(config.pictures, config.model.image_size, limit=32)
    log = RunLog(config, output, ranks, config.wandb, trainer.steps_done)
    metrics = {}
    bar = tqdm(
        total=config.steps,
        initial=trainer.steps_done,
        desc="DualToken",
        unit="step",
        mininterval=10,
        disable=not ranks.main,
    )
    with StopSignal() as stop, bar:
        while trainer.steps_done < config.steps:
            metrics = trainer.step()
            log.write(trainer.steps_done, metrics)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            stopping, last = stop.agreed(), trainer.steps_done == config.steps
            if stopping or last or trainer.steps_done % config.checkpoint_every == 0:
                trainer.save(output)
                if images is not None:
                    picture = trainer.picture(images)
                    picture.save(output / f"reconstructions-{trainer.steps_done:08d}.png")
                    log.write_image(trainer.steps_done, "reconstructions", picture)
            if stopping and not last:
                bar.write(f"stopped by a signal after step {trainer.steps_done}; start again to go on")
                log.close()
                ranks.barrier()  # launchers end ranks that others have left
                sys.exit(EXIT_STOPPED)
    log.close()
    if ranks.main:
        trainer.model.save_pretrained(output / "dualtoken")
    ranks.barrier()
    return metrics
