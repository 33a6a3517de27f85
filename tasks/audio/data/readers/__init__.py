# SPDX-License-Identifier: Apache-2.0
"""Readers of audio files and of a user's own folders."""
