"""Bytes between two hosts: frames, messages, sessions, links. Knows no process and no memory."""
