"""Models that another program serves, asked through OpenAI's interface."""
