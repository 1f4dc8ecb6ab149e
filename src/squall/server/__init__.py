"""The HTTP server, in the shape of OpenAI's API. `squall.server.app.create_app` is the way in."""
