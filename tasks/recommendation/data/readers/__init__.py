# SPDX-License-Identifier: Apache-2.0
"""Readers of logs: your own tables, rating files, MovieLens."""
