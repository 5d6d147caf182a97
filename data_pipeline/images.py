"""Images to codes, on a GPU beside the other work, or on the CPU.

Shape suffixes: B images of a batch, N positions of an image, D depth of a stream, or of all of them one after another.
"""

from collections.abc import Callable

import numpy as np
import torch

from megadual.vision import DualToken
from megadual.vision.fast import FastDualToken, captured
from megadual.vision.tokenizer import centre_crop, normalise_pixels

Codes = Callable[[], dict[str, np.ndarray]]  # waits for the codes of a batch: (B, N, D) uint16 by stream


class ImageEncoder:
    """A DualToken for batches of at most `batch_size` images.

    On a GPU every batch is filled up to that size: the encoder is compiled and captured as a CUDA graph for one
    shape, since launching its kernels one by one would compete with the decoding threads for the interpreter.
    """

    def __init__(self, folder: str, gpu: bool, batch_size: int):
        model = DualToken.from_pretrained(folder, "cuda" if gpu else "cpu")
        self.config, self.gpu, self.batch_size = model.config, gpu, batch_size
        if gpu:
            fast = FastDualToken(model)
            self.encode = lambda images: fast.encode(images, pooled=False)
            size = self.config.image_size
            blank = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8, device="cuda")
            self.compute = captured(self._compute, blank)
        else:
            self.encode = lambda images: model.encode(images, pooled=False)
            self.compute = self._compute

    def preprocess(self, image) -> np.ndarray:
        """A PIL image -> the pixels that `launch` takes, (h, w, 3) uint8."""
        return np.asarray(centre_crop(image, self.config.image_size))

    def _compute(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, N, D) uint16 of all streams in one tensor, which leaves the device at once."""
        codes = self.encode(normalise_pixels(pixels).contiguous()).codes
        return torch.cat(list(codes.values()), dim=-1).flatten(1, 2).to(torch.uint16)

    def _by_stream(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        streams = self.config.streams
        ends = np.cumsum([stream.depth for stream in streams.values()])[:-1]
        return dict(zip(streams, np.split(codes, ends, axis=-1), strict=True))

    @torch.inference_mode()
    def launch(self, images: list[np.ndarray]) -> Codes:
        """Start on at most batch_size images; a GPU works on while the caller does something else."""
        pixels, count = torch.from_numpy(np.stack(images)), len(images)
        if not self.gpu:
            codes = self._by_stream(self.compute(pixels).numpy())
            return lambda: codes
        padded = torch.empty((self.batch_size, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=True)
        padded[:count] = pixels
        result = self.compute(padded)
        codes = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
        codes.copy_(result, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> dict[str, np.ndarray]:
            done.synchronize()
            return self._by_stream(codes.numpy()[:count])

        return wait
