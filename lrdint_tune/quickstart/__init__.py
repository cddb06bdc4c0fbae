"""What ``make quickstart`` needs besides the trainer: a small pretrained model and a small set of worked problems."""
