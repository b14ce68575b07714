"""A bundle behind HTTP: OpenAI's protocol, in which the model picks the tenant."""
