"""An HTTP server for transcription (extra `serve`): OpenAI's audio API, live audio, a page.

Nothing is imported here: the process that decodes audio loads `decoding` alone, and must stay small.
"""
