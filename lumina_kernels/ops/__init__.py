"""One file per op: the public function, its definition `<op>_ref`, and its checks."""
