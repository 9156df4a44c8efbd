"""Fine-tuning jobs as OpenAI's clients know them: one file, one adapter, over TrainingService."""
