"""What `python -m lrdint_tune.launch` does; all its modules but `early` import torch's launcher."""
