"""Settings for every test."""

import torch

# On tensors this small a second thread only waits for the first, for seconds on a busy machine.
torch.set_num_threads(1)
