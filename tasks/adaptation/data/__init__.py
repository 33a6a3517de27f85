# SPDX-License-Identifier: Apache-2.0
"""Domains of labelled images, and episodes drawn from them."""
