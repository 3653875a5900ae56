"""Chunks put into rounds: up to a cap on their time, or by what they are worth."""
