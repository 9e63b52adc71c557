"""The OpenAI-compatible HTTP server. Only these modules import FastAPI and uvicorn."""
