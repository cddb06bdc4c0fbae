"""What `python -m lrdint_tune.launch` does; importing a module of it imports torch's launcher."""
