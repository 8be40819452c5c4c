/* The unit of saving: 16 pages of 4 KiB. A bitmap of its pages has bit i for the page at i * PAGE. */
#pragma once

enum { PAGE = 4096, PAGES = 16, CHUNK = PAGE * PAGES, ALL = (1 << PAGES) - 1 };
