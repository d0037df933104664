"""Training by reward: GRPO by TRL, over the models, methods and run folders of this project."""
