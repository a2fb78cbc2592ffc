"""A server for exports: decoding, batching, the OpenAI interface, and the page; knows nothing of Ray."""
