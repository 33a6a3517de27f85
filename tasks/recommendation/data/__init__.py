# SPDX-License-Identifier: Apache-2.0
"""Logs of impressions with several labels each: generated, packaged, or read from tables."""
