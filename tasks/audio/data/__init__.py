# SPDX-License-Identifier: Apache-2.0
"""Clips of speech and music with prompts: generated, out of packages, read from files, batched as codes."""
