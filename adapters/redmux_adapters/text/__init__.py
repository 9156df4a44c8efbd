"""From texts and chats to token ids: one way for training, serving and scoring."""
