"""What a trained model is worth: losses, the leak, tasks, attention maps, and how sure the numbers are."""
