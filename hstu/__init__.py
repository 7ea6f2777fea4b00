"""Training generative recommenders: data, models, losses, training, evaluation, recommendation."""
