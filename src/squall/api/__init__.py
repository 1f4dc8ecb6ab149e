"""Squall in OpenAI's terms: requests, the jobs they become, responses, and the Runner."""
