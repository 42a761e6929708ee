"""Settings for every test."""

import os

import torch

# Kernels run on the device where there is one, else in Triton's interpreter. Triton reads this
# when it is first imported, by whatever test comes first in this process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On tensors this small a second thread only waits for the first, for seconds on a busy machine.
torch.set_num_threads(1)
