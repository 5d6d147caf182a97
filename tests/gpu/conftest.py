"""These tests need a GPU; where there is none they are not collected."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
