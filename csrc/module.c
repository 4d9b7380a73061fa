/* Makes the shared library importable from Python; the operators register while it loads. */
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void);

PyMODINIT_FUNC PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT,
      "_C",
      "Registers torch.ops.orthoreg.* while it loads; holds nothing itself.",
      0,
      NULL,
      NULL,
      NULL,
      NULL,
      NULL,
  };
  return PyModule_Create(&definition);
}
