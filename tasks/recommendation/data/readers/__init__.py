# SPDX-License-Identifier: Apache-2.0
"""Readers of logs: tables of one's own, rating files, MovieLens."""
