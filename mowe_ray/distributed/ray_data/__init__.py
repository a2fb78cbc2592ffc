"""Ray Data: decoding, feature extraction, batch inference."""
