# SPDX-License-Identifier: Apache-2.0
"""Readers of image folders and of tables that name images."""
