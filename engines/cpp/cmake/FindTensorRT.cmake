# TensorRT's headers and runtime library.
#
#   TENSORRT_ROOT          an unpacked TensorRT (include/, lib/); looked into first
#   TENSORRT_INCLUDE_DIR   folder with NvInferRuntime.h
#   TENSORRT_LIBRARY       libnvinfer.so, or libtensorrt_rtx.so of TensorRT for RTX; plugins need none
#
# Defines TENSORRT_TARGET (tensorrt or tensorrt-rtx), and the targets TensorRT::Headers and, where the library was found, TensorRT::TensorRT.
if(TENSORRT_ROOT)  # an SDK wins over headers that were named besides
  unset(TENSORRT_INCLUDE_DIR CACHE)
endif()
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} PATH_SUFFIXES include include/x86_64-linux-gnu)
find_library(TENSORRT_LIBRARY NAMES nvinfer tensorrt_rtx HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
if(NOT TENSORRT_LIBRARY AND Python_EXECUTABLE)  # TensorRT for RTX's wheel brings its library
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('tensorrt_rtx_libs').submodule_search_locations[0])"
    OUTPUT_VARIABLE _wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  file(GLOB _libraries ${_wheel}/libtensorrt_rtx.so.*)
  if(_wheel AND _libraries)
    list(GET _libraries 0 _library)
    set(TENSORRT_LIBRARY ${_library} CACHE FILEPATH "libnvinfer.so or libtensorrt_rtx.so" FORCE)
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
  REQUIRED_VARS TENSORRT_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "set TENSORRT_ROOT to an unpacked TensorRT, or TENSORRT_INCLUDE_DIR to the folder of NvInferRuntime.h")
# the name of the targets whose engines this library runs
if(TENSORRT_LIBRARY MATCHES "tensorrt_rtx")
  set(TENSORRT_TARGET tensorrt-rtx)
else()
  set(TENSORRT_TARGET tensorrt)
endif()
mark_as_advanced(TENSORRT_INCLUDE_DIR TENSORRT_LIBRARY)

if(TensorRT_FOUND AND NOT TARGET TensorRT::Headers)
  add_library(TensorRT::Headers INTERFACE IMPORTED)
  target_include_directories(TensorRT::Headers SYSTEM INTERFACE ${TENSORRT_INCLUDE_DIR})
  if(TENSORRT_LIBRARY)
    add_library(TensorRT::TensorRT SHARED IMPORTED)
    set_target_properties(TensorRT::TensorRT PROPERTIES IMPORTED_LOCATION ${TENSORRT_LIBRARY})
    target_link_libraries(TensorRT::TensorRT INTERFACE TensorRT::Headers)
  endif()
endif()
